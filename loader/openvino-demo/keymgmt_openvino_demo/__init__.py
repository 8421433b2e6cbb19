"""The commands ``keymgmt demo`` and ``keymgmt leakcheck``, apart from what devices install."""

import keymgmt_openvino  # noqa: F401 - before OpenVINO, whose telemetry it switches off
