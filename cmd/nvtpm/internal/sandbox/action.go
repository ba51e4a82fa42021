package sandbox

// Actions of Filter.
const (
	None = "none" // there is no filter
	Log  = "log"  // what is forbidden is logged by the kernel, and done
	Kill = "kill" // what is forbidden ends the process
)
