"""From masks to stored scores: a session opens engines and store, a dispatcher feeds them."""
