"""What the recipes learn from: rendered pictures, the tokenizer, the example, fixtures of tests."""
