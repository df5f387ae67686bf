"""The labelling page on which a person chooses between two images: the session, the server, the page itself."""
