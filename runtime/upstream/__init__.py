"""Code written for the published models: chat, batch_chat, generate, extract_feature on torch tensors, over transformers.

The only room that knows torch and transformers; both are imported when one of those calls is first used.
"""
