package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/control"
	"nvstore.dev/tpmstate/swtpm"
)

// A tpmRun is a TPM that runs for a verb: an nvtpm with its state in memory,
// so that nothing of it touches a disk. It is a transport of go-tpm's.
type tpmRun struct {
	version tpmstate.Version
	cmd     *exec.Cmd
	ctrl    *control.Client
	conn    net.Conn // control channel
	data    net.Conn
	stderr  bytes.Buffer
}

// findNvtpm looks beside nvtool, and then on the PATH.
func findNvtpm(given string) (string, error) {
	if given != "" {
		return given, nil
	}
	if exe, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(exe), "nvtpm")
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return beside, nil
		}
	}
	path, err := exec.LookPath("nvtpm")
	if err != nil {
		return "", withHint(fmt.Errorf("this verb runs a TPM, and nvtpm isn't there: %w", err), "put nvtpm beside nvtool, or name it with --nvtpm FILE")
	}
	return path, nil
}

// pair makes two connected sockets: ours, and the child's.
func pair() (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "tpm"), os.NewFile(uintptr(fds[1]), "tpm")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return conn, theirs, nil
}

// runTPM starts a TPM on a state, or a new one without, and sends Startup.
func (a *app) runTPM(ctx context.Context, program string, s tpmstate.State, v tpmstate.Version) (r *tpmRun, err error) {
	if program, err = findNvtpm(program); err != nil {
		return nil, err
	}
	r = &tpmRun{version: v}
	conn, theirs, err := pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	args := []string{"socket", "--ctrl", "type=unixio,clientfd=3", "--tpmstate", "backend-uri=memory://"}
	if v == tpmstate.TPM20 {
		args = append(args, "--tpm2")
	}
	r.cmd = exec.CommandContext(ctx, program, args...)
	r.cmd.ExtraFiles = []*os.File{theirs}
	r.cmd.Stderr = &r.stderr
	if err := r.cmd.Start(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	r.conn, r.ctrl = conn, control.NewClient(conn)
	defer func() {
		if err != nil {
			err = r.explain(err)
			r.end()
			r = nil
		}
	}()
	return r, r.begin(s)
}

func (r *tpmRun) begin(s tpmstate.State) error {
	data, theirs, err := pair()
	if err != nil {
		return err
	}
	r.data = data
	err = r.ctrl.Data(theirs)
	theirs.Close()
	if err != nil {
		return err
	}
	for k, b := range s {
		if b == nil || tpmstate.Kind(k) == tpmstate.Volatile {
			continue // it is looked at as it would start after a reset
		}
		blob, err := swtpm.SealBlob(b, swtpm.MigrationKeys{})
		if err != nil {
			return err
		}
		if err := r.ctrl.SetState(tpmstate.Kind(k), blob); err != nil {
			return err
		}
	}
	return r.restart()
}

// restart resets the TPM.
func (r *tpmRun) restart() error {
	if err := r.ctrl.Init(false); err != nil {
		return err
	}
	cmd := []byte("\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x44\x00\x00") // TPM2_Startup(CLEAR)
	if r.version == tpmstate.TPM12 {
		cmd = []byte("\x00\xc1\x00\x00\x00\x0c\x00\x00\x00\x99\x00\x01") // TPM_Startup(ST_CLEAR)
	}
	rsp, err := r.Send(cmd)
	if err != nil {
		return err
	}
	if code := binary.BigEndian.Uint32(rsp[6:]); code != 0 {
		return fmt.Errorf("the TPM's startup failed: %#x", code)
	}
	return nil
}

// Send executes a command. TPM_RC_RETRY is what it says.
func (r *tpmRun) Send(cmd []byte) ([]byte, error) {
	for {
		r.data.SetDeadline(time.Now().Add(2 * time.Minute))
		if _, err := r.data.Write(cmd); err != nil {
			return nil, r.explain(err)
		}
		rsp := make([]byte, 10, 4096)
		if _, err := io.ReadFull(r.data, rsp); err != nil {
			return nil, r.explain(err)
		}
		n := binary.BigEndian.Uint32(rsp[2:])
		if n < 10 || n > 4096 {
			return nil, fmt.Errorf("a response of %d bytes", n)
		}
		rsp = rsp[:n]
		if _, err := io.ReadFull(r.data, rsp[10:]); err != nil {
			return nil, r.explain(err)
		}
		if binary.BigEndian.Uint32(rsp[6:]) != 0x922 {
			return rsp, nil
		}
	}
}

// platform sends a command that go-tpm doesn't have, with the platform's empty
// authorization.
func (r *tpmRun) platform(cc uint32, params []byte) error {
	b := []byte{0x80, 2, 0, 0, 0, 0}
	b = binary.BigEndian.AppendUint32(b, cc)
	b = append(b, "\x40\x00\x00\x0c\x00\x00\x00\x09\x40\x00\x00\x09\x00\x00\x00\x00\x00"...)
	b = append(b, params...)
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)))
	rsp, err := r.Send(b)
	if err != nil {
		return err
	}
	if code := binary.BigEndian.Uint32(rsp[6:]); code != 0 {
		return fmt.Errorf("TPM command %#x failed: %#x", cc, code)
	}
	return nil
}

// take shuts the TPM down and returns its state.
func (r *tpmRun) take() (tpmstate.State, error) {
	var s tpmstate.State
	if r.version == tpmstate.TPM20 {
		rsp, err := r.Send([]byte("\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x45\x00\x00")) // TPM2_Shutdown(CLEAR)
		if err != nil {
			return s, err
		}
		if code := binary.BigEndian.Uint32(rsp[6:]); code != 0 {
			return s, fmt.Errorf("the TPM's shutdown failed: %#x", code)
		}
	}
	blob, err := r.ctrl.State(tpmstate.Permanent)
	if err != nil {
		return s, r.explain(err)
	}
	s[tpmstate.Permanent], err = swtpm.OpenBlob(blob, swtpm.MigrationKeys{})
	return s, err
}

// explain adds what the TPM's process had to say.
func (r *tpmRun) explain(err error) error {
	if text := strings.TrimSpace(strings.ReplaceAll(r.stderr.String(), "nvtpm: ", "")); text != "" {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

func (r *tpmRun) end() {
	if r.data != nil {
		r.data.Close()
	}
	r.conn.Close() // with which nvtpm ends
	r.cmd.Wait()
}
