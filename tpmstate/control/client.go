package control

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"nvstore.dev/tpmstate"
)

// A Client steers a TPM emulator, swtpm or nvtpm. Its methods are called one
// at a time. A result other than Success is a ResultError.
type Client struct {
	conn net.Conn
}

// A ResultError is what a peer answered.
type ResultError struct {
	Command Command
	Result  Result
}

func (e *ResultError) Error() string {
	return fmt.Sprintf("%v: the TPM answered %#x", e.Command, uint32(e.Result))
}

// replyLimit is how long an answer may take: a TPM that is manufactured makes
// primary seeds and tests itself.
const replyLimit = time.Minute

// NewClient is for a connection to the control channel, which the caller
// closes.
func NewClient(conn net.Conn) *Client { return &Client{conn} }

// ask sends a message and reads the n bytes behind the reply's result.
func (c *Client) ask(cmd Command, req []byte, oob []byte, n int) ([]byte, error) {
	c.conn.SetDeadline(time.Now().Add(replyLimit))
	msg := append(words(uint32(cmd)), req...)
	var err error
	if u, ok := c.conn.(*net.UnixConn); ok && oob != nil {
		_, _, err = u.WriteMsgUnix(msg, oob, nil)
	} else {
		_, err = c.conn.Write(msg)
	}
	if err != nil {
		return nil, fmt.Errorf("%v: %w", cmd, err)
	}
	b := make([]byte, 4+n)
	if _, err := io.ReadFull(c.conn, b[:4]); err != nil {
		return nil, fmt.Errorf("%v: %w", cmd, cut(err))
	}
	if r := Result(binary.BigEndian.Uint32(b)); r != Success {
		return nil, &ResultError{cmd, r}
	}
	if _, err := io.ReadFull(c.conn, b[4:]); err != nil {
		return nil, fmt.Errorf("%v: %w", cmd, cut(err))
	}
	return b[4:], nil
}

// Init (re)starts the TPM.
func (c *Client) Init(deleteVolatile bool) error {
	flags := uint32(0)
	if deleteVolatile {
		flags = initDeleteVolatile
	}
	_, err := c.ask(Init, words(flags), nil, 0)
	return err
}

// Stop powers it off.
func (c *Client) Stop() error {
	_, err := c.ask(Stop, nil, nil, 0)
	return err
}

// Shutdown powers it off and ends the process.
func (c *Client) Shutdown() error {
	_, err := c.ask(Shutdown, nil, nil, 0)
	return err
}

// Data hands over the TPM's end of the data channel, which stays the
// caller's to close.
func (c *Client) Data(f *os.File) error {
	_, err := c.ask(SetDataFD, nil, unix.UnixRights(int(f.Fd())), 0)
	return err
}

// State returns a blob of a running TPM as swtpm wraps it, or nil if there is
// none.
func (c *Client) State(k tpmstate.Kind) ([]byte, error) {
	b, err := c.ask(GetStateBlob, words(stateDecrypted, firstType+uint32(k), 0), nil, 12)
	if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(b[8:])
	if n > tpmstate.MaxState+4096 {
		return nil, fmt.Errorf("a %s state of %d bytes: %w", k, n, tpmstate.ErrTooLarge)
	}
	if n == 0 {
		return nil, nil
	}
	blob := make([]byte, n)
	if _, err := io.ReadFull(c.conn, blob); err != nil {
		return nil, fmt.Errorf("%v: %w", GetStateBlob, cut(err))
	}
	return blob, nil
}

// SetState gives a stopped TPM a blob to start with.
func (c *Client) SetState(k tpmstate.Kind, blob []byte) error {
	_, err := c.ask(SetStateBlob, append(words(0, firstType+uint32(k), uint32(len(blob))), blob...), nil, 0)
	return err
}
