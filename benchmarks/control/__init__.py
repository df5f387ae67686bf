"""What maps are obeyed: by scenes whose layout is known, and by what `customize train` has learned."""
