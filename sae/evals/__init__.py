"""How good an SAE is: reconstruction, and what the language model loses by it."""
