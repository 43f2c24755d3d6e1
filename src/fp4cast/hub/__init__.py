"""Models on the Hugging Face Hub, by its own client: sizes, ranges, downloads. Knows files, but not what they hold."""
