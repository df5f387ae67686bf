"""What is learned beside a frozen model: low-rank adapters, embeddings, and the concept folder that holds them."""
