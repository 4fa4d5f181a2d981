"""Where tokens, images and conditions come from; YAML joins these to the tasks."""
