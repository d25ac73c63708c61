"""Labels: captions, the words of subjects, and their domains, made by an endpoint, a local model or word lists."""
