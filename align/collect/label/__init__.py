"""The page on which a person chooses between two pictures: what is asked next, the server, the page itself."""
