"""The model card of a destination, and its picture. Knows how to say what others measured; measures nothing."""
