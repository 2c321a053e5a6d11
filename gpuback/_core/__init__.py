"""The mathematics and its data: tables of functions, number formats, sums, θ, files, threads. Knows no backend."""
