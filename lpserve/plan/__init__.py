"""Sets of players to remove: found by search, compared, chosen and written. Nothing here scores."""
