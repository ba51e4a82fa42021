package blobdir

// Oldest lets tests wait for readers to be gone.
func (d *Dir) Oldest() int64 { return d.oldestReader() }
