"""All results of one scale as a single HTML page: what it says, its curves, its form."""
