"""The numbers: x = a·x0 + b·ε, schedules of noise levels, samplers, losses. Tensors in, tensors out; torch only."""
