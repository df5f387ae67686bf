"""What steers a model beside the prompt: maps of an image's layout, line drawings, camera paths."""
