"""What OpenVINO runs: devices, compiled parts, the KV caches. Knows arrays; no pictures, prompts or text."""
