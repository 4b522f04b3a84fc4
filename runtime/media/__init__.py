"""What people hand in: a picture or a video from wherever it is, and the tiles it is cut into."""
