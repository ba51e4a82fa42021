package seal

import "io"

// SetRand replaces the random source until the returned function is called.
func SetRand(r io.Reader) (restore func()) {
	old := randReader
	randReader = r
	return func() { randReader = old }
}
