"""The calls of the published models: chat, batch_chat, generate, extract_feature on torch tensors, over transformers.

The only room that knows torch and transformers; both are imported on first use of such a call.
"""
