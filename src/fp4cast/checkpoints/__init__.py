"""Files on disk: byte ranges, safetensors headers, directories. Knows names and bytes, but not what a weight is."""
