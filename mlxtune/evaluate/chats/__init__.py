"""Conversations that `mlxtune chat --log` keeps, with thumbs up or down."""
