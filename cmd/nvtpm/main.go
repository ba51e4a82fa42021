// Command nvtpm is a TPM 2.0 or 1.2 (libtpms) whose state lies in a store:
// checksummed, sealed if the store is, atomic, durable when a command is
// answered, and in the machine's own image. It serves QEMU, libvirt and TPM
// clients on swtpm's channels and takes swtpm's options, so that what starts
// swtpm can start it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"nvstore.dev/cmd/internal/swtpmopt"
	"nvstore.dev/cmd/nvtpm/internal/libtpms"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run executes a command line and returns the exit code, which is one of
// nvtool's.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	started := false
	root := root(stdout, stderr, &started)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	if !started {
		err = fmt.Errorf("%w: %w", swtpmopt.ErrUsage, err)
	}
	code, hint := exit(err)
	fmt.Fprintf(stderr, "nvtpm: error: %v\n", err)
	if hint != "" {
		fmt.Fprintf(stderr, "nvtpm: hint: %s\n", hint)
	}
	return code
}

// exit maps an error to nvtool's exit code and the next step.
func exit(err error) (code int, hint string) {
	if d := daemonError(0); errors.As(err, &d) && d > 0 {
		return int(d), ""
	}
	for _, k := range []struct {
		kind error
		code int
		hint string
	}{
		{swtpmopt.ErrUsage, 2, "nvtpm socket --help lists the options"},
		{libtpms.ErrMissing, 1, "apt-get install libtpms0, or name the library with --libtpms FILE"},
		{image.ErrLocked, 13, "another nvtpm, swtpm or machine has it; stop that one first"},
		{nvstore.ErrTampered, 16, "don't trust this image; compare it with a backup"},
		{nvstore.ErrKey, 11, "nvtool key ls IMAGE shows which kinds of key the store has"},
		{keyslot.ErrUnlock, 11, "nvtool key ls IMAGE shows which kinds of key the store has"},
		{nvstore.ErrPlain, 25, "if you trust that the image was never replaced, leave the key out"},
		{swtpm.ErrNoKey, 21, "give --key as swtpm was given it"},
		{swtpm.ErrKey, 11, "give --key as swtpm was given it"},
		{swtpm.ErrPlain, 25, "leave --key out"},
		{swtpm.ErrFormat, 12, "restore it from a backup; nothing was changed"},
		{tpmstate.ErrVersion, 3, "leave out --tpm2, or give it"},
		{nvstore.ErrReverted, 15, "start nvtpm again"},
		{nvstore.ErrNoSpace, 14, "make room on the disk below the image"},
		{nvstore.ErrCorrupt, 12, "nvtool check IMAGE lists what is damaged; nvtool get --previous reads the generation before"},
		{nvstore.ErrFormat, 19, "nvtool create IMAGE makes a store"},
		{os.ErrNotExist, 10, "nvtool create IMAGE makes a store"},
	} {
		if errors.Is(err, k.kind) {
			return k.code, k.hint
		}
	}
	return 1, ""
}

const about = `nvtpm is a TPM 2.0 (--tpm2) or 1.2 whose state lies in a store that nvtool
made, in swtpm's folder or in swtpm's file. Options are swtpm's where they mean
the same; what nvtpm adds is --store and its keys, --mssim, and --libtpms.`

func root(stdout, stderr io.Writer, started *bool) *cobra.Command {
	c := &cobra.Command{Use: "nvtpm", Short: "A TPM whose state lies in a store", Long: about,
		SilenceErrors: true, SilenceUsage: true, Version: programVersion()}
	c.SetVersionTemplate("nvtpm {{.Version}}\n")
	o := &options{stdout: stdout, stderr: stderr}
	sub := &cobra.Command{Use: "socket --ctrl CHANNEL --tpmstate PLACE", Short: "Serve a TPM on sockets", Args: cobra.NoArgs,
		Long: about,
		Example: `  nvtpm socket --tpm2 --store vm.qcow2 --key-file key --ctrl type=unixio,path=tpm.sock
  qemu-system-x86_64 ... -chardev socket,id=c,path=tpm.sock -tpmdev emulator,id=t,chardev=c -device tpm-crb,tpmdev=t

  nvtpm socket --tpm2 --tpmstate backend-uri=nvstore://vm.qcow2 --mssim port=2321 --flags startup-clear
  TPM2TOOLS_TCTI=mssim:port=2321 tpm2_getrandom --hex 8`,
		RunE: func(c *cobra.Command, _ []string) error {
			*started = true
			return o.run(c.Context())
		}}
	o.register(sub)
	c.AddCommand(sub)
	return c
}
