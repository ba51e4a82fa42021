//go:build amd64 || arm64

package libtpms

// localityC is as C's functions are. libtpms calls it in each command, of which
// a short one takes a microsecond: into Go and back again is half of that.
func localityC()

var localityPC uintptr // of localityC

func localityCallback() uintptr { return localityPC }
