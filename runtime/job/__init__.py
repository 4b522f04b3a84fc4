"""Jobs of many questions: requests are read as a stream, answered as fast as there is room, kept so that a job can go on."""
