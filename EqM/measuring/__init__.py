"""How fast it is: workloads with random inputs, and what is measured of them."""
