"""Random numbers as a function of where they are used, instead of a generator with a state.

    u = uniform(seed, step, question, sample, turn, position)

is the same number in [0, 1) whoever computes it and in whatever order. So a rollout depends neither
on the layout of its batch, nor on the number of processes, nor on a resume, and there is no state
to save. Left out: cryptographic strength.
"""

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: keeps runs of small keys (and zeros) apart


def mix64(x: int) -> int:
    """Scramble 64 bits, one to one, as SplitMix64 does (Steele, Lea and Flood, OOPSLA 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def hash64(*keys: int) -> int:
    """Fold the keys into one number: h_0 = 0, h_k = mix64((h_{k-1} XOR key_k) + GOLDEN)."""
    state = 0
    for key in keys:
        state = mix64(((state ^ (key & MASK64)) + GOLDEN) & MASK64)
    return state


def uniform(*keys: int) -> float:
    """A number in [0, 1): the upper 53 bits of the hash over 2^53. A float64 holds it exactly, so
    that it never rounds to 1."""
    return (hash64(*keys) >> 11) / 2**53
