"""What is made of a source before it is encoded: captions, domains and cross pairs."""
