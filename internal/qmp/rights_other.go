//go:build !unix

package qmp

import (
	"errors"
	"os"
)

func (c *Client) writeRights([]byte, *os.File) (int, error) { return 0, errors.ErrUnsupported }
