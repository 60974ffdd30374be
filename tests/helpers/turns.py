"""The order of a mixture's sources, worked out position by position."""

import numpy as np


def plain_loop(phases, num_positions):
    """Source of each position, one after the other: of the rows that are due, the one whose time ends first.

    A source with ``part`` of ``total`` parts is due for its row number k from slot ``k * total / part`` on, rounded
    down, and must have it before slot ``(k + 1) * total / part``, rounded up.
    """
    order, stops = [], [*(start for start, _ in phases[1:]), num_positions]
    for (start, parts), stop in zip(phases, stops, strict=True):
        total, served = sum(parts), [0] * len(parts)
        for slot in range(min(stop, num_positions) - start):
            chosen, chosen_end = -1, None
            for number, part in enumerate(parts):
                if part and served[number] * total // part <= slot:
                    end = -(-(served[number] + 1) * total // part)
                    if chosen_end is None or end < chosen_end:
                        chosen, chosen_end = number, end
            assert chosen_end is not None and slot < chosen_end
            served[chosen] += 1
            order.append(chosen)
    return np.array(order)
