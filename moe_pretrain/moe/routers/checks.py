"""Range checks that configurations of routers have in common; each raises one line naming field, value and limit."""


def check_within_experts(config: object, num_experts: int, *fields: str) -> None:
    """Raise ``ValueError`` if a field of ``config`` asks for more experts than the layer has; None asks for nothing."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and value > num_experts:
            raise ValueError(f"router.{field}={value} must be at most model.moe.num_experts={num_experts}")
