"""GGUF files: llama.cpp's models and adapters, read and written."""
