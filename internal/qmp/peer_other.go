//go:build !linux

package qmp

// PeerPID returns the process that listened on the monitor's socket; 0 if that
// isn't known.
func (c *Client) PeerPID() int { return 0 }
