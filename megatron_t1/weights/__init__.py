"""The model's weights as Hugging Face tensors: who has which part (plan), and their formats on the disk."""
