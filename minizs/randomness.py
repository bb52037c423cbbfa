"""Random numbers as a function of where they are used, instead of a generator with a state.

    u = uniform(seed, step, question, sample, turn, position)

is always the same number in [0, 1) for the same integers, whoever asks for it and in whatever
order. A rollout then does not depend on how its batch is laid out, on how many processes share the
work, or on a run having been stopped and resumed, and there is no generator state to save.

The mixing step is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). All of it is
arithmetic modulo 2^64, so a tensor version can give the same bits (`generate.py` has one).

Left out: cryptographic strength. These numbers decide which token is drawn, nothing else.
"""

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: keeps runs of small keys (and zeros) apart


def mix64(x: int) -> int:
    """One-to-one scrambling of 64 bits; `x` in [0, 2^64), shifts bring in zeros."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def hash64(*keys: int) -> int:
    """Fold integers into one hash in [0, 2^64):

        h_0 = 0,    h_k = mix64((h_{k-1} XOR key_k) + GOLDEN  mod 2^64)

    The order of the keys counts, and so does their number. A negative key is taken modulo 2^64
    (its two's complement). Because it is a fold, the hash of shared leading keys can be computed
    once and continued.
    """
    state = 0
    for key in keys:
        state = mix64(((state ^ (key & MASK64)) + GOLDEN) & MASK64)
    return state


def uniform(*keys: int) -> float:
    """The number in [0, 1) that belongs to these keys: the hash's upper 53 bits over 2^53.

    53 bits are what a float64 holds exactly, so the result is never rounded up to 1.
    """
    return (hash64(*keys) >> 11) / 2**53
