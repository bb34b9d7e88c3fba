"""The gallery's pages: by requests, and in a browser."""
