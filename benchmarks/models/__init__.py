"""Networks that the benchmarks, the study and tests run, with weights and inputs that suit them."""
