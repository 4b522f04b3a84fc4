"""Jobs of many questions: requests are streamed, answered as fast as there is room, and stored so that a job can resume."""
