package chain

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
	"nvstore.dev/image/raw"
)

// OpenBelow opens what a qcow2 image lies in, without opening the image: to
// repair one that doesn't open. The location is a PATH of format QCOW2 or, with
// none given, marked as ours; or a stack whose topmost driver is qcow2. path
// is for error messages.
func OpenBelow(location string, o *Options) (file image.Device, path string, err error) {
	if o == nil {
		o = &Options{}
	}
	n, err := parse(location)
	if err != nil {
		return nil, "", err
	}
	switch {
	case n.driver == QCOW2 && o.Format == "":
		file, err = n.child.open(o)
		return file, n.child.path, err
	case n.driver == "" && (o.Format == QCOW2 || o.Format == ""):
		d, err := raw.Open(n.path, o.raw())
		if err != nil {
			return nil, "", err
		}
		if o.Format == "" {
			format, err := detect(d, n.path)
			if err == nil && format != QCOW2 {
				err = fmt.Errorf("%s: a %s image: %w", n.path, format, image.ErrUnsupported)
			}
			if err != nil {
				return nil, "", errors.Join(err, d.Close())
			}
		}
		return d, n.path, nil
	}
	return nil, "", fmt.Errorf("%s: not a qcow2 image: %w", location, image.ErrUnsupported)
}
