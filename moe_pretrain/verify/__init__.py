"""Does it compute what it says? The oracle, and the certificate of a scheme."""
