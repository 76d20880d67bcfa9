"""From arguments to pictures, one family a file or folder."""
