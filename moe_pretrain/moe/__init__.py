"""Mixture-of-experts layers: routers, dispatch, experts and combine. Torch only; the exchange is handed in."""
