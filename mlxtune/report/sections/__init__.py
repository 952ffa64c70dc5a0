"""What a page tells, one module a section. Each makes its part of the page, or None where there is nothing to show."""
