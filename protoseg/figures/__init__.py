"""Pictures, and the page to explore prototypes in."""
