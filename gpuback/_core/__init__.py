"""What is computed: tables of functions, number formats, θ and files. Knows no backend."""
