"""Files of any known format -> conversations, and back."""
