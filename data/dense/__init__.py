"""Images with boxes, masks or a label for each pixel."""
