"""A small InternVL-C and -G, trained here from drawn scenes and their descriptions, to try search, classification and captions."""
