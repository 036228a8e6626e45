"""Sets of players to remove: proposed, compared, chosen. Nothing here scores."""
